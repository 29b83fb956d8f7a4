"""From a corpus to sparse targets: documents, tokens, packed sequences, teacher, samplers.

Pure functions and small classes; no Beam. `pipelines` gives them work and writes what they return.
"""
