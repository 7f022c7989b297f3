"""The method itself, pure: one layer's mathematics, batched over stacks of same-shaped layers."""
