"""Looking at a store: what a person sees of it in the terminal."""
