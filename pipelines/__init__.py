"""What a user runs: the Beam pipelines, the command line and the quickstart.

The only room that imports Beam; no other room imports this one.
"""
