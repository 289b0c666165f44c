"""Models from models: conversions with receipts, sources of weights, exchange with Hugging Face."""
