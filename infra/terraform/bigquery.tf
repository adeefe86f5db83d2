# Results for analysts. The pipeline delivers at least once, and upserts rows by their ids
# (change data capture of the Storage Write API), so each row exists once.

locals {
  # The schemas are files in schemas/, generated from chatflow's records.
  tables = {
    analyses     = { key = "analysis_id", day_of = "analysed_at", by = "chat_id" }
    drafts       = { key = "draft_id", day_of = "drafted_at", by = "chat_id" }
    dead_letters = { key = "dead_letter_id", day_of = "failed_at", by = "reason" }
  }
}

resource "google_bigquery_dataset" "this" {
  dataset_id                 = replace(var.name, "-", "_")
  location                   = var.region
  description                = "Results of chatflow"
  delete_contents_on_destroy = !var.deletion_protection

  dynamic "default_encryption_configuration" {
    for_each = var.kms_key_name[*]
    content {
      kms_key_name = default_encryption_configuration.value
    }
  }

  depends_on = [google_project_service.apis, google_kms_crypto_key_iam_member.agents]
}

resource "google_bigquery_table" "tables" {
  #checkov:skip=CKV_GCP_80:The dataset's default encryption applies, which is var.kms_key_name if it is set.
  for_each = local.tables

  dataset_id = google_bigquery_dataset.this.dataset_id
  table_id   = each.key
  schema     = file("${path.module}/schemas/${each.key}.json")
  # The key first, because upserts are merged by it.
  clustering          = [each.value.key, each.value.by]
  deletion_protection = var.deletion_protection

  # Upserts are merged in the background, at most this long after they arrive. Without it, every
  # query would merge them first, and take longer and cost more. (Years-months days time.)
  max_staleness = "0-0 0 0:10:0"

  time_partitioning {
    type  = "DAY"
    field = each.value.day_of
  }

  table_constraints {
    primary_key {
      columns = [each.value.key]
    }
  }
}

# A chat that continues is analysed again; this view has each customer's last analysis.
resource "google_bigquery_table" "latest_analyses" {
  #checkov:skip=CKV_GCP_80:A view stores nothing.
  #checkov:skip=CKV_GCP_121:A view stores nothing.
  dataset_id          = google_bigquery_dataset.this.dataset_id
  table_id            = "latest_analyses"
  description         = "For each user in each chat, the analysis with the greatest revision"
  deletion_protection = false

  view {
    use_legacy_sql = false

    # A revision is analysed twice if the prompt or the model changed: the newer analysis counts.
    # (WHERE TRUE: QUALIFY used to demand a clause before it.)
    query = <<-SQL
      SELECT *
      FROM `${var.project}.${google_bigquery_dataset.this.dataset_id}.${google_bigquery_table.tables["analyses"].table_id}`
      WHERE TRUE
      QUALIFY ROW_NUMBER() OVER (
        PARTITION BY chat_id, user_id
        ORDER BY revision DESC, analysed_at DESC
      ) = 1
    SQL
  }
}
