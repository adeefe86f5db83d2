locals {
  labels = merge({ app = var.name }, var.labels)

  # The topics that the pipeline writes to; the records of a chat are published in order.
  results = toset(["analyses", "drafts", "dead-letters"])
  topics  = setunion(local.results, ["events", "undeliverable"])
}

# For its number, which the names of Google's service agents contain.
data "google_project" "this" {
  project_id = var.project
}
