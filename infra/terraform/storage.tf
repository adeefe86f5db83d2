# Chats, results, weights of models, templates, and staged files of jobs. Staging is not in the
# temp bucket, because a stream runs for months, and each new worker fetches its staged files.
resource "google_storage_bucket" "data" {
  #checkov:skip=CKV_GCP_62:Access logs cost more than they are worth here; the project can switch on Data Access audit logs.
  name                        = "${var.project}-${var.name}"
  location                    = var.region
  uniform_bucket_level_access = true
  public_access_prevention    = "enforced"
  force_destroy               = !var.deletion_protection

  versioning {
    enabled = true
  }

  # A run replaces the results of an earlier one; a month is long enough to notice.
  lifecycle_rule {
    condition {
      days_since_noncurrent_time = 30
    }
    action {
      type = "Delete"
    }
  }

  dynamic "encryption" {
    for_each = var.kms_key_name[*]
    content {
      default_kms_key_name = encryption.value
    }
  }

  depends_on = [google_project_service.apis, google_kms_crypto_key_iam_member.agents]
}

# Dataflow's temporary files, and sources on their way to Cloud Build.
resource "google_storage_bucket" "temp" {
  #checkov:skip=CKV_GCP_62:Temporary files.
  #checkov:skip=CKV_GCP_78:Temporary files need no versions.
  name                        = "${var.project}-${var.name}-temp"
  location                    = var.region
  uniform_bucket_level_access = true
  public_access_prevention    = "enforced"
  force_destroy               = true

  lifecycle_rule {
    condition {
      age = 14
    }
    action {
      type = "Delete"
    }
  }

  # Off, as Dataflow's documentation advises: otherwise each temporary file costs a week longer.
  soft_delete_policy {
    retention_duration_seconds = 0
  }

  dynamic "encryption" {
    for_each = var.kms_key_name[*]
    content {
      default_kms_key_name = encryption.value
    }
  }

  depends_on = [google_project_service.apis, google_kms_crypto_key_iam_member.agents]
}
