import CryptoKit
import ExecuTorch
import Foundation

/// Fine-tunes a program that was compiled with `state="io"`, and keeps what it learned in a file.
///
/// The bindings share no memory between the methods of a program, so the adapter goes into every call and comes out of
/// those that change it; this class carries it. Calls take long: make them off the main thread, one at a time.
public final class Trainer {
  /// What a step measured. It repeats the step on another device: see `replay`.
  public struct Step: Codable {
    public let seed: Int32
    public let learningRate: Float
    public let loss: Float
    public let projectedGradient: [Float]
  }

  public enum Failure: Swift.Error {
    case program(String)
    case input(String)
    case state(String)
  }

  /// Steps that made the adapter what it is.
  public private(set) var steps = 0

  private let module: Module
  private let manifest: Manifest
  private let stateURL: URL
  private let seed: Int
  private var state: [Float]

  /// - Parameters:
  ///   - programPath: A `.pte`, `Bundle.main.path(forResource: "program", ofType: "pte")` for instance.
  ///   - stateURL: Where the adapter is kept, in the app's Application Support folder for instance.
  ///   - seed: Of this device; devices that exchange steps need distinct ones.
  public init(programPath: String, stateURL: URL, seed: Int = 0) throws {
    module = Module(filePath: programPath, loadMode: .mmap)
    // Without this, XNNPACK packs the weights once for each method that is loaded.
    let options = try BackendOptionsMap(options: ["XnnpackBackend": [BackendOption("weight_cache_enabled", true)]])
    try module.load(options: options)
    let text: String = try module.execute("mobizo_manifest")
    let decoder = JSONDecoder()
    decoder.keyDecodingStrategy = .convertFromSnakeCase
    manifest = try decoder.decode(Manifest.self, from: Data(text.utf8))
    guard manifest.formatVersion == 12, manifest.state == "io" else {
      throw Failure.program("format \(manifest.formatVersion), state \(manifest.state); this host runs 12, io")
    }
    self.stateURL = stateURL
    self.seed = seed
    state = [Float](repeating: 0, count: manifest.parameters)
    if FileManager.default.fileExists(atPath: stateURL.path) {
      try read()
    }
  }

  /// One step: perturbed forward passes, their losses, the projected gradient and the update, in one call.
  ///
  /// - Parameters:
  ///   - rows: The model's inputs by name, row by row.
  ///   - labels: -100 where nothing is to be predicted.
  public func trainStep(
    rows: [String: [Int64]], labels: [Int64], learningRate: Float, eps: Float? = nil
  ) throws -> Step {
    let stepSeed = Trainer.stepSeed(seed, steps)
    var arguments: [ValueConvertible] = try batch(rows)
    arguments.append(try tensor(manifest.labels, checked(labels)))
    arguments.append(Tensor<Int32>([stepSeed]))
    arguments.append(Tensor<Float>([learningRate]))
    arguments.append(Tensor<Float>([eps ?? manifest.eps]))
    arguments.append(Tensor<Float>(state))
    let outputs = try module.execute("train_step", arguments)
    let loss = try floats(outputs[0])[0]
    let gradient = try floats(outputs[2])
    state = try floats(outputs[3])
    steps += 1
    return Step(seed: stepSeed, learningRate: learningRate, loss: loss, projectedGradient: gradient)
  }

  /// What the model returns for these rows, with the adapter on; the values of every output, row by row.
  public func evaluate(rows: [String: [Int64]]) throws -> [[Float]] {
    var arguments: [ValueConvertible] = try batch(rows)
    arguments.append(Tensor<Float>(state))
    return try module.execute("evaluate", arguments).map(floats)
  }

  /// Repeats the update of a step, of this device or another one, without a forward pass and without its data.
  public func replay(_ step: Step) throws {
    let outputs = try module.execute(
      "replay",
      Tensor<Int32>([step.seed]),
      Tensor<Float>(step.projectedGradient),
      Tensor<Float>([step.learningRate]),
      Tensor<Float>(state)
    )
    state = try floats(outputs[0])
  }

  /// Writes the adapter; the file has the old one or the new one, whatever happens meanwhile.
  public func save() throws {
    var data = withUnsafeBytes(of: UInt32(steps).littleEndian) { Data($0) }
    state.withUnsafeBytes { data.append(contentsOf: $0) }
    try data.write(to: stateURL, options: .atomic)
  }

  private func read() throws {
    let data = try Data(contentsOf: stateURL)
    guard data.count == 4 + 4 * manifest.parameters else {
      throw Failure.state("the adapter in \(stateURL.path) is of another program")
    }
    steps = Int(UInt32(littleEndian: data.withUnsafeBytes { $0.loadUnaligned(as: UInt32.self) }))
    state.withUnsafeMutableBytes { _ = data.copyBytes(to: $0, from: 4..<data.count) }
  }

  /// An output is a view of the runtime's memory, which the next call overwrites; `scalars` copies it.
  private func floats(_ value: Value) throws -> [Float] {
    try Tensor<Float>(value).scalars()
  }

  private func batch(_ rows: [String: [Int64]]) throws -> [Tensor<Int64>] {
    try manifest.inputs.map { spec in
      guard let values = rows[spec.name] else {
        throw Failure.input("\(spec.name) is missing")
      }
      return try tensor(spec, values)
    }
  }

  /// Not every kernel checks token ids: one that is out of range may read foreign memory.
  private func tensor(_ spec: TensorSpec, _ values: [Int64]) throws -> Tensor<Int64> {
    guard spec.dtype == "int64", values.count == spec.shape.reduce(1, *) else {
      throw Failure.input("\(spec.name) is \(spec.dtype) \(spec.shape), not \(values.count) int64")
    }
    if let low = spec.low, let high = spec.high,
      let outside = values.first(where: { !(low...high).contains($0) && $0 != spec.also })
    {
      throw Failure.input("\(spec.name) has the value \(outside), outside \(low)...\(high)")
    }
    return Tensor<Int64>(values, shape: spec.shape)
  }

  /// One label or more must count, and in a row not more than the loss was compiled for.
  private func checked(_ labels: [Int64]) throws -> [Int64] {
    guard let ignored = manifest.labels.also else { return labels }
    let width = manifest.labels.shape.dropFirst().reduce(1, *)
    let counts = stride(from: 0, to: labels.count, by: width).map { start in
      labels[start..<min(start + width, labels.count)].dropFirst(manifest.firstLabel).filter { $0 != ignored }.count
    }
    guard counts.contains(where: { $0 > 0 }) else {
      throw Failure.input("nothing is labelled")
    }
    if let most = manifest.maxLabels, counts.contains(where: { $0 > most }) {
      throw Failure.input("a row has more labels than \(most)")
    }
    return labels
  }

  /// Seed of a step: 31 bits of SHA-256 over the device's seed and the step's number.
  static func stepSeed(_ seed: Int, _ step: Int) -> Int32 {
    let digest = Data(SHA256.hash(data: Data("\(seed) \(step)".utf8)))
    let word = UInt32(littleEndian: digest.withUnsafeBytes { $0.loadUnaligned(as: UInt32.self) })
    return Int32(word & 0x7fff_ffff)
  }
}

/// What the program says about itself; a program with dynamic sizes has names in its shapes, and is refused here.
private struct Manifest: Decodable {
  let formatVersion: Int
  let state: String
  let eps: Float
  let firstLabel: Int
  let maxLabels: Int?
  let inputs: [TensorSpec]
  let labels: TensorSpec
  let sites: [Site]

  var parameters: Int { sites.reduce(0) { $0 + $1.r * $1.outFeatures } }
}

private struct TensorSpec: Decodable {
  let name: String
  let dtype: String
  let shape: [Int]
  let low: Int64?
  let high: Int64?
  let also: Int64?
}

private struct Site: Decodable {
  let r: Int
  let outFeatures: Int
}
