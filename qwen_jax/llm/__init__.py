"""Python API: a model with its tokenizer, engine and sessions, text in and text out."""
