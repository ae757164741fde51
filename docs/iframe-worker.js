// Search without a web server: browsers start no Worker for a page from disk, so its script runs in a hidden frame.
if (location.protocol === "file:")
  window.Worker = class extends EventTarget {
    constructor(address) {
      super()
      const frame = Object.assign(document.createElement("iframe"), { hidden: true, srcdoc: "<body>" })
      this.ready = new Promise((loaded) => (frame.onload = () => loaded(this.start(frame.contentWindow, address))))
      document.body.append(frame)
    }
    start(inside, address) {
      inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }))
      const script = Object.assign(inside.document.createElement("script"), { src: address })
      inside.document.body.append(script)
      return new Promise((loaded) => (script.onload = () => loaded(inside)))
    }
    postMessage(data) {
      this.ready.then((inside) => inside.dispatchEvent(new MessageEvent("message", { data })))
    }
  }
