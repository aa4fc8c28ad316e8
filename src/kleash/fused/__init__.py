"""Exact KL, entropy and log-probs of sampled tokens straight from hidden states: no [batch, time, vocab] tensor.

head -> tiles of logits -> fold -> statistics; the backward pass walks over the tiles once more.
"""
