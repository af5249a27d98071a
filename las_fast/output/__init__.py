"""What is made of hypotheses: scores, submissions, transcripts, pictures."""
