"""Data of the embedded domains, installed as ``ppg_gym.domains``; no code lives here."""
