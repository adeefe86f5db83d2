"""The support staff's web page: drafts to review, what became of them, how the day goes."""
