package com.example.mobizo

import android.content.Context
import android.content.Intent
import android.content.IntentFilter
import android.os.BatteryManager

/** The battery of an Android phone, which also has the thermometer that every phone has. */
class PhoneSensors(private val context: Context) : Sensors {
  override fun battery(): Double? {
    val manager = context.getSystemService(Context.BATTERY_SERVICE) as BatteryManager
    if (manager.isCharging) return null
    val percent = manager.getIntProperty(BatteryManager.BATTERY_PROPERTY_CAPACITY)
    return if (percent in 1..100) percent.toDouble() else null // 0 and the smallest number where it is not known
  }

  override fun temperature(): Double? {
    val last = context.registerReceiver(null, IntentFilter(Intent.ACTION_BATTERY_CHANGED)) ?: return null
    val tenths = last.getIntExtra(BatteryManager.EXTRA_TEMPERATURE, Int.MIN_VALUE)
    return if (tenths == Int.MIN_VALUE) null else tenths / 10.0
  }
}
