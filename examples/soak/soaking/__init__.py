"""A server of EdgePrune under load: questions with known answers, clients that behave and clients that do not, and the account."""
