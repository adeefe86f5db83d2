# Alerts for people on call, with instructions. Thresholds are variables.

locals {
  make = "PROJECT=${var.project} REGION=${var.region} NAME=${var.name}"

  alerts = {
    dead_letters = {
      display_name = "dead letters"
      severity     = "WARNING"
      condition    = "more than ${var.dead_letters_per_minute} a minute"
      filter = join(" AND ", [
        "resource.type = \"pubsub_topic\"",
        "resource.labels.topic_id = \"${google_pubsub_topic.topics["dead-letters"].name}\"",
        "metric.type = \"pubsub.googleapis.com/topic/send_message_operation_count\"",
      ])
      # Counted over five minutes, so that a single bad batch of input does not flap.
      period    = "300s"
      aligner   = "ALIGN_DELTA"
      reducer   = "REDUCE_SUM"
      threshold = var.dead_letters_per_minute * 5
      duration  = "0s"
      content   = <<-EOT
        Chats leave without a result. Nothing is lost: each is a dead letter that says where and
        why it failed, and waits in `${google_pubsub_subscription.results["dead-letters"].id}`
        for 31 days.

        1. Find the reasons. In BigQuery: `SELECT stage, reason, COUNT(*) FROM
           ${google_bigquery_dataset.this.dataset_id}.dead_letters WHERE failed_at >
           TIMESTAMP_SUB(CURRENT_TIMESTAMP(), INTERVAL 1 HOUR) GROUP BY ALL ORDER BY 3 DESC`
           (rows are up to ten minutes late), or `make logs ${local.make}`.
        2. Stage `read`: a sender publishes data that chatflow cannot read; tell them. A stage that
           asks the model: the model is overloaded, out of quota, or its answers are unusable.
        3. When the cause is fixed (`make update ${local.make}` if it was chatflow's), try them
           again: `chatflow replay --input
           ${google_pubsub_subscription.results["dead-letters"].id} --output
           ${google_storage_bucket.data.url}/replayed`, with the flags of the run that they come
           from (`--model` and so on).
      EOT
    }

    undeliverable = {
      display_name = "undeliverable messages"
      severity     = "ERROR"
      condition    = "any message waits"
      filter = join(" AND ", [
        "resource.type = \"pubsub_subscription\"",
        "resource.labels.subscription_id = \"${google_pubsub_subscription.undeliverable.name}\"",
        "metric.type = \"pubsub.googleapis.com/subscription/num_undelivered_messages\"",
      ])
      period    = "60s"
      aligner   = "ALIGN_MAX"
      reducer   = "REDUCE_SUM"
      threshold = 0
      duration  = "0s"
      content   = <<-EOT
        Pub/Sub gave up delivering messages: events after 100 attempts, results after 10. They
        wait in `${google_pubsub_subscription.undeliverable.id}` for 31 days, and
        the alert stays until they are acknowledged there.

        1. List them; `CloudPubSubDeadLetterSourceSubscription` says where each was:
           `gcloud pubsub subscriptions pull ${google_pubsub_subscription.undeliverable.id}
           --limit=10` (without `--auto-ack`, so they stay).
        2. Events: workers fail on them again and again (or on others of the same bundle):
           `make status ${local.make}`, `make logs ${local.make}`. Results: a reader does not
           acknowledge them.
        3. When the cause is fixed, publish the events again to
           `${google_pubsub_topic.topics["events"].id}`, and acknowledge them here.
      EOT
    }

    backlog = {
      display_name = "backlog"
      severity     = "ERROR"
      condition    = "the oldest event is older than ${var.backlog_age_seconds} s"
      filter = join(" AND ", [
        "resource.type = \"pubsub_subscription\"",
        "resource.labels.subscription_id = \"${google_pubsub_subscription.events.name}\"",
        "metric.type = \"pubsub.googleapis.com/subscription/oldest_unacked_message_age\"",
      ])
      period    = "60s"
      aligner   = "ALIGN_MAX"
      reducer   = "REDUCE_MAX"
      threshold = var.backlog_age_seconds
      duration  = "300s"
      content   = <<-EOT
        Events come faster than they are processed, or nothing processes them. They are kept for
        ${var.events_retention}; older events are lost.

        1. `make status ${local.make}` shows no job: `make deploy ${local.make}` starts one. (After
           `make drain`, this alert is expected.)
        2. A job runs with as many workers as it may have: set a larger WORKERS, and
           `make update ${local.make}`.
        3. Workers start and fail, or the model refuses calls: see `make logs ${local.make}`.
      EOT
    }

    freshness = {
      display_name = "data freshness"
      severity     = "WARNING"
      condition    = "a job's watermark is more than ${var.freshness_seconds} s behind"
      filter = join(" AND ", [
        "resource.type = \"dataflow_job\"",
        "resource.labels.job_name = monitoring.regex.full_match(\"${var.name}(-batch)?\")",
        "metric.type = \"dataflow.googleapis.com/job/data_watermark_age\"",
      ])
      period    = "60s"
      aligner   = "ALIGN_MAX"
      reducer   = "REDUCE_MAX"
      threshold = var.freshness_seconds
      duration  = "300s"
      content   = <<-EOT
        The job reads, but something in it is stuck or slow: chats are analysed late.

        1. `make status ${local.make}` names the job; its graph in the console shows the step
           whose watermark does not move.
        2. `make logs ${local.make}`: a stream retries a failing bundle forever. Slow calls of the
           model show there, too.
        3. If a new version fixes it: `make update ${local.make}`. If the new version does not fit
           the old one's state: `make drain ${local.make}`, then `make deploy ${local.make}`.
      EOT
    }

    failed = {
      display_name = "job failed"
      severity     = "CRITICAL"
      condition    = "a job has failed"
      filter = join(" AND ", [
        "resource.type = \"dataflow_job\"",
        "resource.labels.job_name = monitoring.regex.full_match(\"${var.name}(-batch)?\")",
        "metric.type = \"dataflow.googleapis.com/job/is_failed\"",
      ])
      period    = "60s"
      aligner   = "ALIGN_MAX"
      reducer   = "REDUCE_MAX"
      threshold = 0
      duration  = "0s"
      content   = <<-EOT
        A Dataflow job has failed. Events wait in `${google_pubsub_subscription.events.id}`
        for ${var.events_retention}; the job's open chats are lost with its state.

        1. `make logs ${local.make}` shows the reason: most often workers could not start
           (image, quota, permission), or an update did not fit.
        2. `make deploy ${local.make}` starts a new job.
      EOT
    }
  }
}

resource "google_monitoring_notification_channel" "email" {
  for_each = toset(var.alert_emails)

  display_name = "${var.name}: ${each.value}"
  type         = "email"
  user_labels  = local.labels

  labels = {
    email_address = each.value
  }

  depends_on = [google_project_service.apis]
}

resource "google_monitoring_alert_policy" "alerts" {
  for_each = local.alerts

  display_name          = "${var.name}: ${each.value.display_name}"
  severity              = each.value.severity
  combiner              = "OR"
  notification_channels = [for channel in google_monitoring_notification_channel.email : channel.name]
  user_labels           = local.labels

  conditions {
    display_name = each.value.condition

    condition_threshold {
      filter          = each.value.filter
      comparison      = "COMPARISON_GT"
      threshold_value = each.value.threshold
      duration        = each.value.duration

      aggregations {
        alignment_period     = each.value.period
        per_series_aligner   = each.value.aligner
        cross_series_reducer = each.value.reducer
      }
    }
  }

  documentation {
    subject   = "${var.name}: ${each.value.display_name}"
    mime_type = "text/markdown"
    content   = trimspace(each.value.content)
  }

  alert_strategy {
    auto_close = "1800s" # the minimum; a job that has ended stops reporting
  }

  depends_on = [google_project_service.apis]
}
