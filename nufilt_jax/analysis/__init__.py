"""Pictures of what a merge did."""
