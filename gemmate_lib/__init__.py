"""GemmaTE Course: a small library behind the fine-tuning notebooks."""

__version__ = "0.1.0"
