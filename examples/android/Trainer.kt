package com.example.mobizo

import android.util.AtomicFile
import java.io.Closeable
import java.io.File
import java.io.FileNotFoundException
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.security.MessageDigest
import org.json.JSONArray
import org.json.JSONObject
import org.pytorch.executorch.EValue
import org.pytorch.executorch.Module
import org.pytorch.executorch.Tensor

/**
 * Fine-tunes a program that was compiled with `state="io"`, and keeps what it learned in a file.
 *
 * The bindings share no memory between the methods of a program, so the adapter goes into every call and comes out of
 * those that change it; this class carries it. Calls take long: make them off the main thread, one at a time.
 *
 * @param programPath a `.pte` in the file system (copy it there from the assets of the app)
 * @param stateFile where the adapter is kept, `File(context.filesDir, "adapter.state")` for instance
 * @param seed of this device; devices that exchange steps need distinct ones
 */
class Trainer(programPath: String, stateFile: File, private val seed: Int = 0) : Trainable, Closeable {

  /** What a step measured. It repeats the step on another device: see [replay]. */
  class Step(val seed: Int, val learningRate: Float, val loss: Float, val projectedGradient: FloatArray)

  private val module = Module.load(programPath, Module.LOAD_MODE_MMAP)
  private val manifest = JSONObject(module.execute("mobizo_manifest")[0].toStr())
  private val inputs = manifest.getJSONArray("inputs").objects()
  private val labels = manifest.getJSONObject("labels")
  private val parameters = manifest.getJSONArray("sites").objects().sumOf { it.getInt("r") * it.getInt("out_features") }
  private val file = AtomicFile(stateFile)
  private var state = FloatArray(parameters)

  /** Steps that made the adapter what it is. */
  override var steps = 0
    private set

  init {
    check(manifest.getInt("format_version") == 12) { "the program has format ${manifest.getInt("format_version")}" }
    check(manifest.getString("state") == "io") { "compile the program with state=\"io\"" }
    read()
  }

  /**
   * One step: perturbed forward passes, their losses, the projected gradient and the update, in one call.
   *
   * @param rows the model's inputs by name, row by row
   * @param labels -100 where nothing is to be predicted
   */
  fun trainStep(rows: Map<String, LongArray>, labels: LongArray, learningRate: Float, eps: Float = defaultEps): Step {
    val stepSeed = stepSeed(seed, steps)
    val outputs =
        module.execute(
            "train_step",
            *batch(rows),
            EValue.from(tensor(this.labels, checked(labels))),
            EValue.from(Tensor.fromBlob(intArrayOf(stepSeed), longArrayOf(1))),
            number(learningRate),
            number(eps),
            stateValue(),
        )
    val loss = outputs[0].toTensor().dataAsFloatArray[0]
    val gradient = outputs[2].toTensor().dataAsFloatArray
    keep(outputs.last())
    steps += 1
    return Step(stepSeed, learningRate, loss, gradient)
  }

  /** What the model returns for these rows, with the adapter on. */
  fun evaluate(rows: Map<String, LongArray>): List<Tensor> =
      module.execute("evaluate", *batch(rows), stateValue()).map { it.toTensor() }

  /** Repeats the update of a step, of this device or another one, without a forward pass and without its data. */
  fun replay(step: Step) {
    val queries = longArrayOf(step.projectedGradient.size.toLong())
    val outputs =
        module.execute(
            "replay",
            EValue.from(Tensor.fromBlob(intArrayOf(step.seed), longArrayOf(1))),
            EValue.from(Tensor.fromBlob(step.projectedGradient, queries)),
            number(step.learningRate),
            stateValue(),
        )
    keep(outputs.last())
  }

  /** Writes the adapter; the file has the old one or the new one, whatever happens meanwhile. */
  override fun save() {
    val bytes = ByteBuffer.allocate(Int.SIZE_BYTES + parameters * Float.SIZE_BYTES).order(ByteOrder.LITTLE_ENDIAN)
    bytes.putInt(steps).asFloatBuffer().put(state)
    val stream = file.startWrite()
    try {
      stream.write(bytes.array())
      file.finishWrite(stream)
    } catch (error: Throwable) {
      file.failWrite(stream)
      throw error
    }
  }

  override fun close() = module.close()

  private val defaultEps: Float
    get() = manifest.getDouble("eps").toFloat()

  private fun read() {
    val data =
        try {
          file.readFully()
        } catch (_: FileNotFoundException) {
          return // a new adapter, which is zero
        }
    val bytes = ByteBuffer.wrap(data).order(ByteOrder.LITTLE_ENDIAN)
    check(bytes.capacity() == Int.SIZE_BYTES + parameters * Float.SIZE_BYTES) { "the adapter is of another program" }
    steps = bytes.getInt()
    bytes.asFloatBuffer().get(state)
  }

  /** An output is a view of the runtime's memory, which the next call overwrites; `dataAsFloatArray` copies it. */
  private fun keep(output: EValue) {
    state = output.toTensor().dataAsFloatArray
  }

  private fun stateValue() = EValue.from(Tensor.fromBlob(state, longArrayOf(parameters.toLong())))

  private fun number(value: Float) = EValue.from(Tensor.fromBlob(floatArrayOf(value), longArrayOf(1)))

  private fun batch(rows: Map<String, LongArray>): Array<EValue> =
      inputs.map { EValue.from(tensor(it, rows.getValue(it.getString("name")))) }.toTypedArray()

  /** Not every kernel checks token ids: one that is out of range may read foreign memory. */
  private fun tensor(spec: JSONObject, values: LongArray): Tensor {
    val name = spec.getString("name")
    check(spec.getString("dtype") == "int64") { "$name is ${spec.getString("dtype")}; this host passes int64" }
    if (!spec.isNull("low")) {
      val range = spec.getLong("low")..spec.getLong("high")
      val outside = values.firstOrNull { it !in range && (spec.isNull("also") || it != spec.getLong("also")) }
      require(outside == null) { "$name has the value $outside, outside $range" }
    }
    val shape = spec.getJSONArray("shape")
    return Tensor.fromBlob(values, LongArray(shape.length()) { shape.getLong(it) })
  }

  /** One label or more must count, and in a row not more than the loss was compiled for. */
  private fun checked(values: LongArray): LongArray {
    if (labels.isNull("also")) return values
    val rows = values.toList().chunked(values.size / labels.getJSONArray("shape").getInt(0))
    val counts = rows.map { row -> row.drop(manifest.getInt("first_label")).count { it != labels.getLong("also") } }
    require(counts.any { it > 0 }) { "nothing is labelled" }
    val most = if (manifest.isNull("max_labels")) Int.MAX_VALUE else manifest.getInt("max_labels")
    require(counts.all { it <= most }) { "a row has more labels than $most" }
    return values
  }

  companion object {
    /** Seed of a step: 31 bits of SHA-256 over the device's seed and the step's number. */
    fun stepSeed(seed: Int, step: Int): Int {
      val digest = MessageDigest.getInstance("SHA-256").digest("$seed $step".toByteArray())
      return ByteBuffer.wrap(digest).order(ByteOrder.LITTLE_ENDIAN).getInt() and Int.MAX_VALUE
    }

    private fun JSONArray.objects() = List(length()) { getJSONObject(it) }
  }
}
