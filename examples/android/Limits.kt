package com.example.mobizo

/** What is trained step by step, and kept in a file: [Trainer]. */
interface Trainable {
  /** Steps that were made, in this process and before it. */
  val steps: Int

  /** Writes what was learned, and the number of steps. */
  fun save()
}

/** What a device says of itself: [PhoneSensors]. */
interface Sensors {
  /** The charge in percent; null while it is charged. */
  fun battery(): Double?

  /** In degrees Celsius; null where nothing says so. */
  fun temperature(): Double?
}

/**
 * What ends a call of [finetune] between two steps. The same call goes on with the run later, after a restart of the
 * device too.
 *
 * @param minutes so long, from here
 * @param battery when the charge falls below so many percent and is not being charged
 * @param temperature when the device is hotter than so many degrees Celsius
 * @param sensors what knows battery and temperature
 * @param nanoseconds a clock that only goes forward
 */
class Limits(
    private val minutes: Double? = null,
    private val battery: Double? = null,
    private val temperature: Double? = null,
    private val sensors: Sensors? = null,
    private val nanoseconds: () -> Long = System::nanoTime
) {
  private val start = nanoseconds()
  private var looked: Long? = null

  /** Why it ended; null as long as it goes on. */
  @Volatile
  var reason: String? = null
    private set

  init {
    for ((name, limit) in mapOf("minutes" to minutes, "battery" to battery, "temperature" to temperature)) {
      require(limit == null || limit > 0) { "$name is $limit; it must be above 0" }
    }
    require(battery == null || battery <= 100) { "battery is $battery percent" }
    require(sensors != null || (battery == null && temperature == null)) { "battery and temperature need sensors" }
    require(temperature == null || sensors?.temperature() != null) { "this device does not say how hot it is" }
  }

  /** Ends the call after the step that is being made, from any thread: in `onStopJob` of a JobService, for instance. */
  fun stop(why: String = "it was stopped") {
    reason = reason ?: why
  }

  /** Whether a limit is reached; asks the sensors every five seconds, because that takes longer than a small step. */
  fun reached(): Boolean {
    val now = nanoseconds()
    if (reason == null && minutes != null && now - start >= minutes * 60e9) {
      reason = "$minutes minutes are over"
    }
    val last = looked
    if (reason == null && sensors != null && (last == null || now - last >= 5_000_000_000L)) {
      looked = now
      val charge = if (battery == null) null else sensors.battery()
      val heat = if (temperature == null) null else sensors.temperature()
      if (charge != null && charge < battery!!) {
        reason = "the battery is at $charge %"
      } else if (heat != null && heat > temperature!!) {
        reason = "the device is at $heat degrees"
      }
    }
    return reason != null
  }
}

/**
 * Makes steps until there are so many, counting those of earlier calls, or a limit is reached.
 *
 * @param steps how many in all; what was saved counts
 * @param saveEvery seconds; a device that is switched off loses the steps since then
 * @param step makes the step of this number, with `trainer.trainStep` on rows that depend on the number alone
 * @return why it ended before; null if all steps are made. What was learned is saved in either case
 */
fun finetune(
    trainer: Trainable,
    steps: Int,
    limits: Limits = Limits(),
    saveEvery: Double = 60.0,
    nanoseconds: () -> Long = System::nanoTime,
    step: (Int) -> Unit
): String? {
  var saved = nanoseconds()
  try {
    while (trainer.steps < steps && !limits.reached()) {
      step(trainer.steps)
      if (nanoseconds() - saved >= saveEvery * 1e9) {
        trainer.save()
        saved = nanoseconds()
      }
    }
  } finally {
    trainer.save()
  }
  return if (trainer.steps < steps) limits.reason else null
}
