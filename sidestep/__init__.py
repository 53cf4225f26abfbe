"""Train LoRA and LoKr adapters for ACE-Step 1.5 from composable Hydra configs."""

__version__ = "0.1.0"
