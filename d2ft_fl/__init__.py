"""Federated fine-tuning of transformers under hard per-client budgets, head by head."""

__version__ = "0.1.0"
