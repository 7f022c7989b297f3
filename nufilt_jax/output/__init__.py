"""The output folder: its recipe, its place, the state of a merge, the model card."""
