"""Fine-tune a hand-written Llama 3.2 on Alpaca-format data with PyTorch Lightning."""
