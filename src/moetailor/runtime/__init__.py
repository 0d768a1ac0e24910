"""Compressed experts as transformers runs, loads and saves them."""
