"""Whether a model is served exactly: a tiny copy of it against the definition of the method, before it is patched."""
