"""What a merge did: affinities, losses and forecasts as numbers, pictures of them, and a report."""
