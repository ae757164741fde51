"""A trained model as files that hold data only, and the engine that scores with them: no process group, no sharding, no
optimizer. ``artifact``: the files; ``tables``: rows read where they lie; ``model``: the model over them; ``requests``: a
request's columns; ``scorer``: scores and ranks."""
