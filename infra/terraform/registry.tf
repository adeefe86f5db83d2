resource "google_artifact_registry_repository" "images" {
  repository_id = var.name
  location      = var.region
  format        = "DOCKER"
  description   = "Images of chatflow's workers and templates"
  kms_key_name  = var.kms_key_name

  # A stream that scales up pulls its image again, even if it is old. So only images without a tag
  # are deleted, and none of the newest ten: give each build its own tag.
  cleanup_policies {
    id     = "keep-newest"
    action = "KEEP"

    most_recent_versions {
      keep_count = 10
    }
  }

  cleanup_policies {
    id     = "delete-untagged"
    action = "DELETE"

    condition {
      tag_state  = "UNTAGGED"
      older_than = "2592000s" # 30 days
    }
  }

  depends_on = [google_project_service.apis, google_kms_crypto_key_iam_member.agents]
}
