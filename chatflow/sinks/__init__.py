"""Out: records to files, Pub/Sub, BigQuery, databases and webhooks."""
