"""Text to batches: sources -> documents -> token streams -> windows.

`text.prepare` does everything up to the streams once and caches it; `text.train_batches` and
`text.validation_batches` read them. Nothing here knows of models, devices or JAX.
"""
