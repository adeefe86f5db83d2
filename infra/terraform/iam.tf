# Three accounts, each with only the roles that it needs, on the resources that it uses: the worker
# runs the pipeline, the launcher (CI) starts it, the build makes its images.

locals {
  buckets = {
    data = google_storage_bucket.data.name
    temp = google_storage_bucket.temp.name
  }

  worker   = google_service_account.worker.member
  launcher = google_service_account.launcher.member
  build    = google_service_account.build.member
}

# --- The worker -------------------------------------------------------------------------------

resource "google_service_account" "worker" {
  account_id   = "${var.name}-worker"
  display_name = "${var.name}: Dataflow workers"

  depends_on = [google_project_service.apis]
}

# dataflow.worker has the permissions for logs and metrics (logging.logEntries.create,
# monitoring.timeSeries.create), and storage.buckets.get.
resource "google_project_iam_member" "worker" {
  for_each = toset(concat(
    ["roles/dataflow.worker"],
    var.remote_models ? ["roles/aiplatform.user"] : [],
  ))

  project = var.project
  role    = each.value
  member  = local.worker
}

# Events for the pipeline, and dead letters, so that `chatflow replay` can run on Dataflow, too.
# Dataflow needs the viewer's role to read the settings of its subscriptions.
resource "google_pubsub_subscription_iam_member" "worker_subscribes" {
  for_each = toset(["events", "dead-letters"])

  subscription = local.subscriptions[each.value]
  role         = "roles/pubsub.subscriber"
  member       = local.worker
}

resource "google_pubsub_subscription_iam_member" "worker_views" {
  for_each = toset(["events", "dead-letters"])

  subscription = local.subscriptions[each.value]
  role         = "roles/pubsub.viewer"
  member       = local.worker
}

resource "google_pubsub_topic_iam_member" "worker_publishes" {
  for_each = local.results

  topic  = google_pubsub_topic.topics[each.value].name
  role   = "roles/pubsub.publisher"
  member = local.worker
}

resource "google_pubsub_topic_iam_member" "worker_views" {
  for_each = setunion(local.results, ["events"])

  topic  = google_pubsub_topic.topics[each.value].name
  role   = "roles/pubsub.viewer"
  member = local.worker
}

resource "google_storage_bucket_iam_member" "worker_uses_objects" {
  for_each = local.buckets

  bucket = each.value
  role   = "roles/storage.objectUser"
  member = local.worker
}

resource "google_bigquery_dataset_iam_member" "worker_edits" {
  dataset_id = google_bigquery_dataset.this.dataset_id
  role       = "roles/bigquery.dataEditor"
  member     = local.worker
}

resource "google_artifact_registry_repository_iam_member" "worker_reads" {
  repository = google_artifact_registry_repository.images.name
  location   = google_artifact_registry_repository.images.location
  role       = "roles/artifactregistry.reader"
  member     = local.worker
}

# --- The launcher -----------------------------------------------------------------------------

resource "google_service_account" "launcher" {
  account_id   = "${var.name}-launcher"
  display_name = "${var.name}: starts, updates and drains jobs"

  depends_on = [google_project_service.apis]
}

# compute.viewer: launching reads machine types and the network, which dataflow.developer does
# not include.
resource "google_project_iam_member" "launcher" {
  #checkov:skip=CKV_GCP_49:Jobs have no IAM policy, so dataflow.developer is granted on the project; jobs can run only as the worker, see below.
  for_each = toset(["roles/dataflow.developer", "roles/compute.viewer"])

  project = var.project
  role    = each.value
  member  = local.launcher
}

# It may run jobs as the worker, and as no other account.
resource "google_service_account_iam_member" "launcher_acts_as_worker" {
  service_account_id = google_service_account.worker.name
  role               = "roles/iam.serviceAccountUser"
  member             = local.launcher
}

resource "google_storage_bucket_iam_member" "worker_views_objects" {
  for_each = toset(var.read_buckets)

  bucket = each.value
  role   = "roles/storage.objectViewer"
  member = local.worker
}

resource "google_storage_bucket_iam_member" "launcher_uses_objects" {
  for_each = local.buckets

  bucket = each.value
  role   = "roles/storage.objectUser"
  member = local.launcher
}

# Beam reads the bucket's settings before it stages files there.
resource "google_storage_bucket_iam_member" "launcher_reads_buckets" {
  for_each = local.buckets

  bucket = each.value
  role   = "roles/storage.legacyBucketReader"
  member = local.launcher
}

resource "google_artifact_registry_repository_iam_member" "launcher_reads" {
  repository = google_artifact_registry_repository.images.name
  location   = google_artifact_registry_repository.images.location
  role       = "roles/artifactregistry.reader"
  member     = local.launcher
}

resource "google_pubsub_topic_iam_member" "launcher_views" {
  for_each = local.topics

  topic  = google_pubsub_topic.topics[each.value].name
  role   = "roles/pubsub.viewer"
  member = local.launcher
}

resource "google_pubsub_subscription_iam_member" "launcher_views" {
  for_each = merge(local.subscriptions, { undeliverable = google_pubsub_subscription.undeliverable.name })

  subscription = each.value
  role         = "roles/pubsub.viewer"
  member       = local.launcher
}

# --- The build --------------------------------------------------------------------------------

# Cloud Build runs as this account with
#
#   gcloud builds submit --gcs-source-staging-dir=gs://PROJECT-NAME-temp/source \
#     --service-account=projects/PROJECT/serviceAccounts/NAME-build@PROJECT.iam.gserviceaccount.com
#
# and with `options: {logging: CLOUD_LOGGING_ONLY}`, which your own service account requires. The
# source goes through the temp bucket, so the account needs no role on Cloud Build's default bucket.
# A person who submits a build needs roles/cloudbuild.builds.editor, and
# roles/iam.serviceAccountUser on this account; the launcher has neither.
resource "google_service_account" "build" {
  account_id   = "${var.name}-build"
  display_name = "${var.name}: builds images"

  depends_on = [google_project_service.apis]
}

resource "google_project_iam_member" "build" {
  project = var.project
  role    = "roles/logging.logWriter"
  member  = local.build
}

resource "google_artifact_registry_repository_iam_member" "build_writes" {
  repository = google_artifact_registry_repository.images.name
  location   = google_artifact_registry_repository.images.location
  role       = "roles/artifactregistry.writer"
  member     = local.build
}

# Weights that go into the image (data), and the source (temp).
resource "google_storage_bucket_iam_member" "build_views_objects" {
  for_each = local.buckets

  bucket = each.value
  role   = "roles/storage.objectViewer"
  member = local.build
}

# --- The key ----------------------------------------------------------------------------------

# Services encrypt with the key as their own service agents. Asking for the agents of Cloud
# Storage and BigQuery makes them; the others come with their APIs.

data "google_storage_project_service_account" "this" {
  count = var.kms_key_name == null ? 0 : 1
}

data "google_bigquery_default_service_account" "this" {
  count = var.kms_key_name == null ? 0 : 1
}

locals {
  key_users = var.kms_key_name == null ? {} : {
    artifact_registry = "service-${data.google_project.this.number}@gcp-sa-artifactregistry.iam.gserviceaccount.com"
    bigquery          = data.google_bigquery_default_service_account.this[0].email
    compute           = "service-${data.google_project.this.number}@compute-system.iam.gserviceaccount.com"
    dataflow          = "service-${data.google_project.this.number}@dataflow-service-producer-prod.iam.gserviceaccount.com"
    pubsub            = "service-${data.google_project.this.number}@gcp-sa-pubsub.iam.gserviceaccount.com"
    storage           = data.google_storage_project_service_account.this[0].email_address
  }
}

resource "google_kms_crypto_key_iam_member" "agents" {
  for_each = local.key_users

  crypto_key_id = var.kms_key_name
  role          = "roles/cloudkms.cryptoKeyEncrypterDecrypter"
  member        = "serviceAccount:${each.value}"

  depends_on = [google_project_service.apis]
}
