"""PEFT folders of LoRA adapters: read on top of a base, and written."""
