import Foundation

/// What is trained step by step, and kept in a file: `Trainer`.
public protocol Trainable: AnyObject {
  /// Steps that were made, in this process and before it.
  var steps: Int { get }
  /// Writes what was learned, and the number of steps.
  func save() throws
}

extension Trainer: Trainable {}

/// What ends a call of `finetune` between two steps. The same call goes on with the run later, after a restart of the
/// device too.
public final class Limits {
  /// Why it ended; nil as long as it goes on.
  public var reason: String? { lock.withLock { found } }

  private let minutes: Double?
  private let battery: Double?
  private let thermal: ProcessInfo.ThermalState?
  private let charge: (() -> Double?)?
  private let heat: () -> ProcessInfo.ThermalState
  private let seconds: () -> TimeInterval
  private let start: TimeInterval
  private var looked: TimeInterval?
  private let lock = NSLock()
  private var found: String?

  /// - Parameters:
  ///   - minutes: So long, from here.
  ///   - battery: When the charge falls below so many percent and is not being charged.
  ///   - thermal: When the device is at least so hot; iOS tells no degrees. `.serious` is when it slows down.
  ///   - charge: The charge in percent, nil while it is charged; asked on the thread that trains. `UIDevice` wants to be
  ///     asked on the main thread: keep what it notifies of there, and return that here.
  ///   - heat: How hot the device is.
  ///   - seconds: A clock that only goes forward.
  public init(
    minutes: Double? = nil, battery: Double? = nil, thermal: ProcessInfo.ThermalState? = nil,
    charge: (() -> Double?)? = nil,
    heat: @escaping () -> ProcessInfo.ThermalState = { ProcessInfo.processInfo.thermalState },
    seconds: @escaping () -> TimeInterval = { ProcessInfo.processInfo.systemUptime }
  ) {
    precondition(minutes ?? 1 > 0, "minutes must be above 0")
    precondition(battery == nil || charge != nil, "a limit on the battery needs what knows its charge")
    precondition((battery ?? 1) > 0 && (battery ?? 1) <= 100, "battery must be a charge in percent")
    self.minutes = minutes
    self.battery = battery
    self.thermal = thermal
    self.charge = charge
    self.heat = heat
    self.seconds = seconds
    start = seconds()
  }

  /// Ends the call after the step that is being made, from any thread: in the `expirationHandler` of a
  /// `BGProcessingTask`, for instance.
  public func stop(_ why: String = "it was stopped") {
    lock.withLock { found = found ?? why }
  }

  /// Whether a limit is reached; asks the device every five seconds, because that may take longer than a small step.
  public func reached() -> Bool {
    let now = seconds()
    if reason == nil, let minutes, now - start >= 60 * minutes {
      stop("\(minutes) minutes are over")
    }
    if reason == nil, looked.map({ now - $0 >= 5 }) ?? true {
      looked = now
      if let battery, let left = charge?(), left < battery {
        stop("the battery is at \(left) %")
      } else if let thermal, heat().rawValue >= thermal.rawValue {
        stop("the device is too hot")
      }
    }
    return reason != nil
  }
}

/// Makes steps until there are so many, counting those of earlier calls, or a limit is reached.
///
/// - Parameters:
///   - steps: How many in all; what was saved counts.
///   - saveEvery: Seconds; a device that is switched off loses the steps since then.
///   - step: Makes the step of this number, with `trainer.trainStep` on rows that depend on the number alone.
/// - Returns: Why it ended before; nil if all steps are made. What was learned is saved in either case.
@discardableResult
public func finetune(
  _ trainer: Trainable, steps: Int, limits: Limits = Limits(), saveEvery: TimeInterval = 60,
  step: (Int) throws -> Void
) throws -> String? {
  var saved = ProcessInfo.processInfo.systemUptime
  do {
    while trainer.steps < steps, !limits.reached() {
      try step(trainer.steps)
      if ProcessInfo.processInfo.systemUptime - saved >= saveEvery {
        try trainer.save()
        saved = ProcessInfo.processInfo.systemUptime
      }
    }
  } catch {
    try trainer.save()
    throw error
  }
  try trainer.save()
  return trainer.steps < steps ? limits.reason : nil
}
