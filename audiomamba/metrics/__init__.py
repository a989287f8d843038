"""What generated clips are judged by: likelihoods, scores from a classifier, and speech recognition."""
