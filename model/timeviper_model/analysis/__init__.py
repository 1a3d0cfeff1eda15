"""What the paper's analysis asks of a model: blocked information flow, other drop plans, and attention maps.

Nothing here is part of training or serving: those paths know nothing of it.
"""
