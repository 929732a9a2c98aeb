"""One reload from its first weight to its commit: sessions, roads, rollback."""
