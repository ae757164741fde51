"""What a run says of itself while it trains: metrics, progress bar, trackers, alerts, coverage, stragglers, profiles."""
