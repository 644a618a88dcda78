"""The doors: the `ddpm` command, submission to clusters, presets."""
