"""The learner: a language model that practises staying in character, by partial policy gradients.

Knows an environment through Gymnasium's API alone. Importing this package imports nothing heavy.
"""
