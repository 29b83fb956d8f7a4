"""The contracts between the rooms: errors, run configs and the store's manifest.

Only typed descriptions and their validation live here; nothing here reads a store or runs a model.
"""
