"""Exchange with Hugging Face: architectures, folders of safetensors, export and import."""
