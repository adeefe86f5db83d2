# Each topic has a subscription of the same name:
#
#   NAME-events         messages and chats; the pipeline reads them
#   NAME-analyses       results, for whoever reads them
#   NAME-drafts         the same
#   NAME-dead-letters   chats without a result, with the reason; `chatflow replay` reads them
#   NAME-undeliverable  messages of all of the above that Pub/Sub could not deliver

locals {
  pubsub_agent = "serviceAccount:service-${data.google_project.this.number}@gcp-sa-pubsub.iam.gserviceaccount.com"

  longest_retention = "2678400s" # 31 days, the maximum

  subscriptions = merge(
    { events = google_pubsub_subscription.events.name },
    { for kind, subscription in google_pubsub_subscription.results : kind => subscription.name },
  )
}

resource "google_pubsub_topic" "topics" {
  for_each = local.topics

  name         = "${var.name}-${each.value}"
  kms_key_name = var.kms_key_name

  depends_on = [google_project_service.apis, google_kms_crypto_key_iam_member.agents]
}

resource "google_pubsub_subscription" "events" {
  name                       = "${var.name}-events"
  topic                      = google_pubsub_topic.topics["events"].id
  ack_deadline_seconds       = 60
  message_retention_duration = var.events_retention

  # No ordering: chatflow sorts messages by event time, and ordered delivery is slower. No
  # retry policy either: Dataflow does not support backoff.

  # Dataflow hands back whole bundles when a worker fails, so a small number would remove good
  # messages with the bad ones. chatflow writes its own dead letters for messages that it cannot
  # read, so this is only for messages that crash workers again and again.
  dead_letter_policy {
    dead_letter_topic     = google_pubsub_topic.topics["undeliverable"].id
    max_delivery_attempts = 100 # the maximum
  }

  expiration_policy {
    ttl = "" # never, also when no pipeline has run for a month
  }
}

resource "google_pubsub_subscription" "results" {
  for_each = local.results

  name                 = "${var.name}-${each.value}"
  topic                = google_pubsub_topic.topics[each.value].id
  ack_deadline_seconds = 60

  # Dead letters wait until somebody fixes their cause.
  message_retention_duration = each.value == "dead-letters" ? local.longest_retention : "604800s"

  # The ordering key is the chat's id: revisions of a chat come one after the other.
  enable_message_ordering = true

  dead_letter_policy {
    dead_letter_topic     = google_pubsub_topic.topics["undeliverable"].id
    max_delivery_attempts = 10
  }

  retry_policy {
    minimum_backoff = "10s"
    maximum_backoff = "600s"
  }

  expiration_policy {
    ttl = ""
  }
}

resource "google_pubsub_subscription" "undeliverable" {
  name                       = "${var.name}-undeliverable"
  topic                      = google_pubsub_topic.topics["undeliverable"].id
  ack_deadline_seconds       = 60
  message_retention_duration = local.longest_retention

  expiration_policy {
    ttl = ""
  }
}

# Pub/Sub moves undeliverable messages with its service agent, which needs permission to publish
# them there and to acknowledge them in the old subscription.
resource "google_pubsub_topic_iam_member" "agent_publishes_undeliverable" {
  topic  = google_pubsub_topic.topics["undeliverable"].name
  role   = "roles/pubsub.publisher"
  member = local.pubsub_agent
}

resource "google_pubsub_subscription_iam_member" "agent_takes_undeliverable" {
  for_each = local.subscriptions

  subscription = each.value
  role         = "roles/pubsub.subscriber"
  member       = local.pubsub_agent
}
