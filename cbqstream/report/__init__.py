"""Output for people: progress, status, reports, figures and model cards."""
