"""certification: randomized smoothing, from noise and votes to certified radii and their files."""
