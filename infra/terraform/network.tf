# A network for the workers, unless var.subnetwork names one.
#
# The workers need no public addresses (--no_use_public_ips): Google's services, Vertex AI
# among them, are reached through private Google access. The workers cannot reach the internet: a
# model fetched from hf:// or kaggle:// at start needs a Cloud NAT, one in the image or in
# gs:// does not.

locals {
  own_network = var.subnetwork == ""
  subnetwork  = local.own_network ? "regions/${var.region}/subnetworks/${var.name}" : var.subnetwork
}

resource "google_compute_network" "this" {
  count = local.own_network ? 1 : 0

  name                    = var.name
  auto_create_subnetworks = false

  depends_on = [google_project_service.apis]
}

resource "google_compute_subnetwork" "this" {
  count = local.own_network ? 1 : 0

  name                     = var.name
  network                  = google_compute_network.this[0].id
  region                   = var.region
  ip_cidr_range            = "10.64.0.0/20" # 4,092 workers
  private_ip_google_access = true

  log_config {
    aggregation_interval = "INTERVAL_10_MIN"
    flow_sampling        = 0.1
    metadata             = "EXCLUDE_ALL_METADATA"
  }
}

# Workers exchange data on these ports if Streaming Engine and Dataflow Shuffle do not; Dataflow
# tags its machines "dataflow".
resource "google_compute_firewall" "workers" {
  count = local.own_network ? 1 : 0

  name        = "${var.name}-workers"
  network     = google_compute_network.this[0].name
  description = "Traffic between Dataflow workers"
  direction   = "INGRESS"
  source_tags = ["dataflow"]
  target_tags = ["dataflow"]

  allow {
    protocol = "tcp"
    ports    = ["12345-12346"]
  }
}
