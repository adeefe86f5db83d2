locals {
  labels = merge({ app = var.name }, var.labels)

  # Where the pipeline writes to; each is published in order of the chat.
  results = toset(["analyses", "drafts", "dead-letters"])
  topics  = setunion(local.results, ["events", "undeliverable"])
}

# For its number, of which the names of Google's service agents are made.
data "google_project" "this" {
  project_id = var.project
}
