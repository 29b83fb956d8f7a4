"""The store: layout, codec, writer, ledger, reader, verification, statistics and inspector.

NumPy and TensorStore only; `docs/format.md` is the specification of what is written.
"""
