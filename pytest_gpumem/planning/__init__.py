"""Will a model fit a card, and what takes the room? Answered on a simulated card."""
