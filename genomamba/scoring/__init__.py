"""What a language model of DNA is asked: likelihoods, embeddings, variant scores, tracks and new sequences."""
