"""Outputs made from hypotheses: scores, submissions, transcripts, pictures."""
