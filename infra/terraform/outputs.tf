# `terraform output -json` prints all of these for scripts.

output "project" {
  value       = var.project
  description = "The project."
}

output "region" {
  value       = var.region
  description = "The region of everything here; run jobs there, too."
}

output "bucket" {
  value       = google_storage_bucket.data.url
  description = "Chats, results, weights, templates and staging."
}

output "temp_bucket" {
  value       = google_storage_bucket.temp.url
  description = "For --temp_location, and for sources of Cloud Build."
}

output "repository" {
  value       = "${var.region}-docker.pkg.dev/${var.project}/${google_artifact_registry_repository.images.repository_id}"
  description = "Where images are pushed to and pulled from."
}

output "worker_account" {
  value       = google_service_account.worker.email
  description = "For --service_account_email."
}

output "launcher_account" {
  value       = google_service_account.launcher.email
  description = "The account of CI."
}

output "build_account" {
  value       = google_service_account.build.email
  description = "The account of Cloud Build."
}

output "subnetwork" {
  value       = local.subnetwork
  description = "For --subnetwork, with --no_use_public_ips."
}

output "subscription" {
  value       = google_pubsub_subscription.events.id
  description = "For --input."
}

output "dead_letters_subscription" {
  value       = google_pubsub_subscription.results["dead-letters"].id
  description = "For chatflow replay --input."
}

output "topics" {
  value       = { for kind, topic in google_pubsub_topic.topics : replace(kind, "-", "_") => topic.id }
  description = "events to publish to; analyses, drafts and dead_letters for the flags of these names; undeliverable."
}

output "dataset" {
  value       = "${var.project}.${google_bigquery_dataset.this.dataset_id}"
  description = "The tables analyses, drafts and dead_letters, and the view latest_analyses."
}

output "kms_key_name" {
  value       = var.kms_key_name
  description = "For --dataflow_kms_key; null without one."
}
