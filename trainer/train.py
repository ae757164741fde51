"""``torchrun … -m trainer.train``: the program of ``trainer.training``, whose docstring says what it does.

Only started, never imported: ``from trainer import train`` is a function (``trainer.api``), and an import of this file would
take its place."""

from trainer.runtime.cpu import start_again_with_variables
from trainer.training import main

if __name__ == "__main__":
    start_again_with_variables()
    main()
